"""`python -m blockscale` is the command `blockscale`."""

from blockscale.cli.main import main

if __name__ == "__main__":
    main()
