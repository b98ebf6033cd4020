"""A client of the hosted API fal-ai/pulid that sends once, waits patiently, and keeps keys and faces where they belong.

Read job.py first: one request from its values to its pictures. The rest are its parts.
"""
