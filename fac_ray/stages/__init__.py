"""What each stage depends on and where it writes: the config comes in, the finished stage goes out."""
