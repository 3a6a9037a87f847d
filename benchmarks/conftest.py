from t2.weights.machine import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(machine())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keeps what a comparison needs: every round of every path, and the machine's limits in that round."""
    output_json.pop("commit_info", None)
    output_json["benchmarks"] = [
        {"test": benchmark["name"].partition("[")[0], **benchmark["extra_info"]}
        for benchmark in output_json["benchmarks"]
    ]
