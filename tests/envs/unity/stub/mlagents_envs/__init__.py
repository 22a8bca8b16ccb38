"""Stands in for mlagents_envs where it is missing: as much of its face as `unity_worker` uses, and pickles for gRPC."""

__version__ = "stub"
