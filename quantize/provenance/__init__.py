"""What an artifact says of itself to others: licence, provenance statement, bill of materials, signature.

documents.py is the way in for publishing, signature.py for checking. Nothing is imported here: the model card needs
licence.py alone.
"""
