"""Benchmarks of time and memory: training, aggregation and bank files."""
