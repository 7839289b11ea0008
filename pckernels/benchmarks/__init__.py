"""Benchmarks that check their numbers before they time them: a registry of cases, and what runs, counts, draws and compares them.

models -> cases -> contenders -> verification -> timing -> runner -> record (JSON); tables, figures, page and guard read the record alone.
"""
