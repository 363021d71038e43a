//! What a job would cost in each preset of precision.

use crate::cli::config_file::Loaded;
use crate::cli::plan::{largest_batch, make_plan, plan_json};
use crate::cli::text;
use halfmode::precision::{Precision, PrecisionConfig, Preset};
use halfmode::tensor::Target;
use halfmode::train::job::{DataShapes, JobPlan};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// A preset with a half format, and what the job would cost in it.
pub(crate) struct Column {
    config: PrecisionConfig,
    /// The plan, or why there is none.
    plan: Result<JobPlan, String>,
    /// The largest batch that fits the memory in question.
    largest_batch: Option<usize>,
}

/// Plans the job in every preset, in both half formats where that makes a difference.
pub(crate) fn columns(loaded: &Loaded, shapes: &DataShapes, target: Target, memory: Option<usize>) -> Vec<Column> {
    let formats = [Precision::F16, Precision::Bf16];
    let halves = [Preset::Amp, Preset::Mixed, Preset::Half];
    let mut configs = vec![PrecisionConfig::new(Preset::Full, Precision::F16)];
    configs.extend(formats.iter().flat_map(|&format| halves.map(|preset| PrecisionConfig::new(preset, format))));
    let plans = configs.into_iter().map(|config| {
        let mut loaded = loaded.clone();
        loaded.config.precision = config.clone();
        let plan = make_plan(&loaded, shapes, target).map_err(|err| err.what().to_owned());
        let largest_batch = memory.and_then(|memory| largest_batch(&loaded.config, shapes, target, memory));
        Column { config, plan, largest_batch }
    });
    plans.collect()
}

/// What each op keeps for backward, in bytes of its own.
fn by_op(plan: &JobPlan) -> BTreeMap<&'static str, usize> {
    let mut bytes = BTreeMap::new();
    for row in plan.saved.rows.iter().filter(|row| !row.shared) {
        *bytes.entry(row.op).or_default() += row.bytes;
    }
    bytes
}

impl Column {
    fn name(&self) -> String {
        match self.config.preset {
            Preset::Full => "full".to_owned(),
            preset => format!("{preset} {}", self.config.format),
        }
    }

    /// The column as JSON; `why` is null where the job is legal.
    pub(crate) fn json(&self) -> Value {
        let mut object = match &self.plan {
            Ok(plan) => plan_json(plan),
            Err(_) => json!({}),
        };
        object["preset"] = json!(self.config.preset);
        object["format"] = json!(self.config.format);
        object["legal"] = self.plan.is_ok().into();
        object["why"] = self.plan.as_ref().err().map_or(Value::Null, |why| why.as_str().into());
        object["by_op"] = self.plan.as_ref().map_or(Value::Null, |plan| json!(by_op(plan)));
        object["largest_batch"] = self.largest_batch.map_or(Value::Null, Value::from);
        object
    }
}

/// Bytes by purpose and by op, and the largest batch, one column per precision.
pub(crate) fn table(columns: &[Column]) -> String {
    let legal: Vec<(&Column, &JobPlan)> =
        columns.iter().filter_map(|column| Some((column, column.plan.as_ref().ok()?))).collect();
    let names: Vec<String> = legal.iter().map(|(column, _)| column.name()).collect();
    let header: Vec<&str> = std::iter::once("").chain(names.iter().map(String::as_str)).collect();
    let row = |name: &str, value: &dyn Fn(&Column, &JobPlan) -> String| {
        std::iter::once(name.to_owned()).chain(legal.iter().map(|(column, plan)| value(column, plan))).collect()
    };
    let mut rows: Vec<Vec<String>> = Vec::new();
    if let Some((_, first)) = legal.first() {
        for (idx, (purpose, _)) in first.memory.iter().enumerate() {
            let peak = |plan: &JobPlan| plan.memory.iter().nth(idx).map_or(0, |(_, usage)| usage.peak);
            if legal.iter().any(|(_, plan)| peak(plan) > 0) {
                rows.push(row(purpose.name(), &|_, plan| text::bytes(peak(plan))));
            }
        }
        for op in by_op(first).keys() {
            let kept = |plan: &JobPlan| by_op(plan).get(op).copied().unwrap_or(0);
            rows.push(row(&format!("kept by {op}"), &|_, plan| text::bytes(kept(plan))));
        }
    }
    rows.push(row("activations (training)", &|_, plan| text::bytes(plan.peak_activation_bytes())));
    rows.push(row("whole job", &|_, plan| text::bytes(plan.peak_bytes())));
    let batch = |column: &Column| column.largest_batch.map_or_else(|| "-".to_owned(), |batch| batch.to_string());
    rows.push(row("largest batch", &|column, _| batch(column)));
    let mut text = text::table(&header, &rows);
    for column in columns {
        if let Err(why) = &column.plan {
            text.push_str(&format!("{} is not legal here: {why}\n", column.name()));
        }
    }
    text
}
