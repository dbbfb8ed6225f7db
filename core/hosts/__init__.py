"""Hosts: implementations of the backbone interface."""
