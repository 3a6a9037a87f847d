from t2.throughput import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()
    machine_info.update(machine())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keeps what a comparison needs: seconds per call, by group and path."""
    output_json.pop("commit_info", None)
    output_json["benchmarks"] = [
        {
            "group": benchmark["group"],
            "path": benchmark["params"]["path"],
            **{name: float(f"{benchmark['stats'][name]:.4g}") for name in ("median", "min", "iqr")},
        }
        for benchmark in output_json["benchmarks"]
    ]
