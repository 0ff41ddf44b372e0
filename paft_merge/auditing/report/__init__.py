"""What an audit shows: advice, gate, charts, HTML page, CSV."""
