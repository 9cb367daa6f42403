"""`python -m wgates_plugin`: the same as `wgates`."""

from wgates_plugin.cli import app

if __name__ == "__main__":
    app(prog_name="wgates")
