"""From a command line to settings, and from an error to one line and an exit status."""
