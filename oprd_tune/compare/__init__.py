"""Several runs in one picture and one table: `python -m oprd_tune compare RUN RUN …`."""
