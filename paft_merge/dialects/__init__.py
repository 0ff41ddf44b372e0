"""The forms in which programs write LoRA adapters, and what each program that serves adapters does with one.

`held` reads a folder by its headers, `traits` says what is unusual about it, `rules` says what each reader makes of that.
"""
