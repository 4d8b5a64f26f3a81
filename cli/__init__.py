"""What every entry point shares: errors as one line, and configuration files that refuse a wrong key."""
