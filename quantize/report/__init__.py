"""Pages about artifacts for people: `quantize report`.

collect.py gathers what is known, production.py decides, views.py puts it into words and numbers, charts.py draws,
render.py fills the templates: Markdown, one HTML file that needs nothing else, and production_decision.md.
"""
