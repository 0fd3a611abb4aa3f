"""From a point of the front to files that can be deployed, with a certificate that anybody can check again.

``pick`` chooses, ``export`` writes the folder, ``certificate`` certifies the file that was written, ``recheck`` does it
again from the files alone. ``document`` is ``certificate.json`` as data; ``patterns`` says which texts and numbers may
stand in it, in every version. What a certificate says of itself (texts, card, comparison of bounds) belongs to its
``schema_version``: ``version_1`` is frozen, ``version_2`` is written today, ``wording`` is the table of them.
"""
