"""The paper's Tables 1 to 3 as Markdown: a model's own rows beside the paper's."""

# (title, columns: figure -> heading, the paper's row: its own model on its own data, after fine-tuning)
TABLES = (
    ("Table 1, reconstruction", {"mse": "MSE", "mae": "MAE"}, {"mse": 2.89e-3, "mae": 0.0292}),
    ("Table 2, generation", {"fid": "FID", "fvd": "FVD", "ssim": "SSIM", "kid": "KID", "lpips": "LPIPS"}, {}),
    ("Table 3, ejection fraction", {"ef_r2": "R2", "ef_mae": "MAE", "ef_rmse": "RMSE"},
     {"ef_r2": 0.85, "ef_mae": 2.5, "ef_rmse": 2.9}),
)


def markdown(measured, about):
    """measured: the figures of each table, None = not computed; about: a line on set, weights and machine."""
    parts = [f"# Tables 1 to 3\n\nMeasured here: {about}. The paper's figures are quoted: other data."]
    for (title, columns, paper), figures in zip(TABLES, measured):
        def row(source, values):
            cells = ("not computed" if values.get(key) is None else f"{values[key]:.3g}" for key in columns)
            return f"| {source} | {' | '.join(cells)} |"
        rows = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|",
                row(f"measured here, {figures['clips']} clips", figures)]
        if paper:
            rows.append(row("ECHOPulse, quoted", {key: paper.get(key) for key in columns}))
        parts.append(f"## {title}\n\n" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"
