"""Programs that kill builds, fill their disk, take their memory: python -m tools.NAME."""
