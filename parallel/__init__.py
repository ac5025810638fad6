"""Mesh axes, the rules that place arrays on them, and the collectives of the manual region. Imports none of ours."""
