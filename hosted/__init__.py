"""A client of the hosted API fal-ai/pulid that sends once, waits patiently, and keeps keys and faces where they belong.

Read job.py first: one request from its values to its pictures. The rest are its parts.

    api         the values of a request and of its answer     transport  one HTTP exchange, and repeats of it
    endpoints   where requests go, the key, safe addresses    queue      submit, status, result, cancel
    references  photographs on their way out                  pictures   pictures on their way in, and kept here
    journal     what was sent and what became of it           service    all of it, put together
    errors      the exceptions, and words for failures
"""
