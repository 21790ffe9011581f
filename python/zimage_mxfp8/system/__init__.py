"""This machine and this installation: devices, drivers, optional packages."""
