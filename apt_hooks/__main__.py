"""`python -m apt_hooks` is the command `apt-hooks`; `accelerate launch -m apt_hooks` runs it in several processes."""

from .cli import main

if __name__ == "__main__":
    main()
