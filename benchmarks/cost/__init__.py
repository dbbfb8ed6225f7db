"""Seconds and memory of learning, aggregation and bank files."""
