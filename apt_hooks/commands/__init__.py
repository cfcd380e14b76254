"""What `apt-hooks` can be told to do: each module parses options, calls the library, prints."""
