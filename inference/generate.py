"""DeepSeek's `inference/generate.py` by its arguments: `blockscale generate`."""

import sys

from blockscale.cli.main import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
