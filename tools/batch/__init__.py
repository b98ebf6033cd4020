"""`run.py batch`: a graph and a table of inputs become pictures, over as many GPUs as Ray has.

table.py reads the table, plan.py makes jobs of its rows, worker.py is one ComfyUI that carries a job out, drive.py
gives jobs to workers through Ray, output.py keeps what they made, session.py holds it together, command.py is the
command.
"""

from ...run import Failure


class BatchError(Failure):
    """What the user has to know before anything is started, or why the whole run ends; the message is in words."""
