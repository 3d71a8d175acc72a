"""What people see: the console, the report, numbers and text as they are printed."""
