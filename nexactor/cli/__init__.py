"""The command line. It stands above all rooms and imports them inside commands, so that `--help` is instant."""
