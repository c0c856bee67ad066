"""Builds the documentation: hooks of MkDocs, the API reference, tables and pictures made from results.

hooks        what MkDocs calls: files from outside of docs/, generated tables, links to the reference, checks
docstrings   a Griffe extension that turns the project's docstrings into Markdown
signatures   the constructors of the public classes, with what they inherit
public       the public names, and which of them the reference lacks
tables       tables of the files under experiments/results
pictures     the pictures that are committed under docs/images
"""
