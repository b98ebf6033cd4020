"""A client of the hosted API fal-ai/pulid that sends once, waits patiently, and keeps keys and faces where they belong.

Read job.py first: one request from its values to its pictures, on one page. The rest are its parts.

    api        the values of a request and of its answer    keys      where the key comes from, and keeping it quiet
    addresses  where to send, and what may go there         transport one HTTP exchange, and what its failure proves
    client     the queue: submit, status, result, cancel    wording   what a failure is called
    storage    photographs on their way out                 download  pictures on their way in
    journal    what was sent and what became of it          results   pictures that were paid for
    waiting    asking where a request stands, with limits   telling   what a user is told in the end
    patience   repeats, and pauses that can be broken off   service   all of it, put together
"""
