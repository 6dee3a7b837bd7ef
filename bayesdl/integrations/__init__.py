"""Bridges to other libraries: one file each, and the library itself is imported when it is used."""
