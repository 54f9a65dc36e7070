"""Hydra config root: config.yaml and one file a recipe. A package, because Hydra's pkg:// source asks for one."""
