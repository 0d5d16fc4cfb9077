"""`batchclf schema`: the JSON Schema of the job file."""

import click

from batchclf.cli.streams import print_result


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of the job file, for editors and programs.

    \b
      batchclf schema > batchclf.schema.json
    """
    import orjson

    from batchclf.spec.job import JobSpec

    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    schema |= JobSpec.model_json_schema()
    print_result(orjson.dumps(schema, option=orjson.OPT_INDENT_2).decode())
