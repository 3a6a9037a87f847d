from machine import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(machine())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keeps the statistics, drops the single timings."""
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
    output_json.pop("commit_info", None)
