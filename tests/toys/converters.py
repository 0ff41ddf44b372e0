"""Stand-ins for the programs of llama.cpp and mlx-lm: they take the same arguments, and write small files of the same kind."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

HAS_GGUF = find_spec("gguf") is not None

_WRITE = """
import struct

def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw

def write(out, tensors, arch="llama", **fields):
    fields = {"general.architecture": arch, **fields}
    made = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    for key, value in fields.items():
        made += text(key) + (struct.pack("<I", 8) + text(value) if isinstance(value, str) else struct.pack("<II", 4, value))
    data = b""
    for name, (shape, raw) in tensors.items():
        made += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 0, len(data))
        data += raw + bytes(-len(raw) % 32)
    open(out, "wb").write(made + bytes(-len(made) % 32) + data)
"""
_LOAD = """
import argparse, json, pathlib, struct, time
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
for name in ("outfile", "outtype", "base"):
    parser.add_argument(f"--{name}")
given = parser.parse_args()
tensors = {}
for file in sorted(given.model.glob("*.safetensors")):
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    for name, one in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            a, b = one["data_offsets"]
            tensors[name] = one["shape"], raw[8 + size + a : 8 + size + b]
(pathlib.Path(given.outfile).parent.parent / "asked").write_text(json.dumps({k: str(v) for k, v in vars(given).items()}))
"""
CONVERT = f"""{_WRITE}{_LOAD}
config = json.loads((given.model / "config.json").read_text())
fields = {{"llama.block_count": config.get("num_hidden_layers", 1)}}
if (given.model / "chat_template.jinja").exists():
    fields["tokenizer.chat_template"] = (given.model / "chat_template.jinja").read_text()
write(given.outfile, tensors, **fields)
"""
LOSING = CONVERT.replace("write(given.outfile, tensors", "write(given.outfile, dict(list(tensors.items())[1:])")
FAILING = "import sys; print('Model LlamaForBirds is not supported'); sys.exit(3)"
SLOW = f"{_LOAD}\nopen(given.outfile, 'wb').write(b'GGUF')\ntime.sleep(60)"
NOTHING = "pass"
TEXT = f"{_LOAD}\nopen(given.outfile, 'w').write('an error page')"
LORA = f"""{_WRITE}{_LOAD}
ends = {{".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}}
named = {{n[: -len(end)] + ours: t for n, t in tensors.items() for end, ours in ends.items() if n.endswith(end)}}
write(given.outfile, named, **{{"adapter.type": "lora"}})
"""
QUANTIZE = """#!/bin/sh
cp "$1" "$2"; echo "$3" > "$(dirname "$(dirname "$2")")/quantized"
"""
MLX = """
import argparse, shutil, sys
parser = argparse.ArgumentParser()
for name in ("hf-path", "mlx-path", "q-bits"):
    parser.add_argument(f"--{name}")
parser.add_argument("-q", action="store_true")
given = parser.parse_args([a for a in sys.argv[1:] if a != "convert"])
shutil.copytree(given.hf_path, given.mlx_path)
"""


def checkout(folder: Path, convert: str = CONVERT) -> Path:
    """A folder with the scripts and the built program of llama.cpp; `convert` is the text of its converter."""
    (folder / "build" / "bin").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(convert)
    (folder / "convert_lora_to_gguf.py").write_text(LORA)
    program = folder / "build" / "bin" / "llama-quantize"
    program.write_text(QUANTIZE)
    program.chmod(0o755)
    return folder
