"""What breaks a job off or damages its files, tried in numbers: `PYTHONPATH=tests python -m faults --help`.

After each, either the result equals the unbroken one's bit for bit, or one line says what is wrong.
"""
