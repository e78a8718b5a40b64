"""What a person or a program sees while a command runs: terminal lines, JSON lines, tables; and Ctrl+C."""
