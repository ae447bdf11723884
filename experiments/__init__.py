"""One script per system: its data, its presets, its report. Run as `python -m experiments.<system> [preset]`."""
