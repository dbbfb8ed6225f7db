"""Hosts: the models that carry concepts, each behind the backbone interface."""
