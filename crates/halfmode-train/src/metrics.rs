//! `metrics.jsonl`: one JSON object per line.

use crate::{Error, Result, atomic_write};
use serde::Serialize;
use serde_json::{Map, Value};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Appends records to a metrics file. Each is on the disk's queue as a whole line when
/// [`MetricsLog::append`] returns; numbers that are not finite are written as `null`.
#[derive(Debug)]
pub struct MetricsLog {
    file: File,
    path: PathBuf,
}

impl MetricsLog {
    /// An empty file, whatever was there before.
    ///
    /// # Errors
    /// Those of writing.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        atomic_write(path.as_ref(), b"")?;
        Self::open(path.as_ref())
    }

    /// The file of a run that goes on: keeps the records before the first that `keep` refuses.
    /// These are the records that the interrupted run wrote after its last checkpoint. A last line
    /// that was cut off by a crash is dropped. A missing file is created.
    ///
    /// # Errors
    /// [`Error::MetricsLine`] for a line that is no JSON object, and those of reading and writing.
    pub fn resume(path: impl AsRef<Path>, keep: impl Fn(&Map<String, Value>) -> bool) -> Result<Self> {
        let path = path.as_ref();
        let text = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Self::create(path),
            Err(err) => return Err(Error::read(path, err)),
        };
        let mut kept = 0;
        for (line, record) in records(path, &text) {
            if !keep(&record?) {
                break;
            }
            kept += line.len();
        }
        if kept < text.len() {
            atomic_write(path, &text[..kept])?;
        }
        Self::open(path)
    }

    fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().append(true).open(path).map_err(|err| Error::write(path, err))?;
        Ok(MetricsLog { file, path: path.to_owned() })
    }

    /// Appends one record.
    ///
    /// # Errors
    /// [`Error::NotAnObject`] if it is none, [`Error::ToJson`] if it cannot be written as JSON, and
    /// those of writing.
    pub fn append(&mut self, record: &impl Serialize) -> Result<()> {
        let value = serde_json::to_value(record).map_err(|source| Error::ToJson { what: "a record", source })?;
        let found = match value {
            Value::Object(_) => None,
            Value::Array(_) => Some("an array"),
            Value::String(_) => Some("a string"),
            Value::Number(_) => Some("a number"),
            Value::Bool(_) => Some("true or false"),
            Value::Null => Some("nothing"),
        };
        if let Some(found) = found {
            return Err(Error::NotAnObject { found });
        }
        // Written from the record, not from the value, to keep the order of its fields.
        let mut line = serde_json::to_vec(record).map_err(|source| Error::ToJson { what: "a record", source })?;
        line.push(b'\n');
        // One call, so that lines of two writers do not mix.
        self.file.write_all(&line).and_then(|()| self.file.flush()).map_err(|err| Error::write(&self.path, err))
    }
}

/// All records of a metrics file. A last line without its end, cut off by a crash or still being
/// written, is left out.
///
/// # Errors
/// [`Error::MetricsLine`] for a line that is no JSON object, and those of reading.
pub fn read_metrics(path: impl AsRef<Path>) -> Result<Vec<Map<String, Value>>> {
    let path = path.as_ref();
    let text = std::fs::read(path).map_err(|err| Error::read(path, err))?;
    records(path, &text).map(|(_, record)| record).collect()
}

/// The whole lines of a file and what is in them.
fn records<'a>(path: &'a Path, text: &'a [u8]) -> impl Iterator<Item = (&'a [u8], Result<Map<String, Value>>)> {
    let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    text[..whole].split_inclusive(|&byte| byte == b'\n').enumerate().map(move |(idx, line)| {
        let located = |source| Error::MetricsLine { path: path.to_owned(), line: idx + 1, source };
        (line, serde_json::from_slice(line).map_err(located))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::fs;

    fn file(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("halfmode-metrics-{name}-{}.jsonl", std::process::id()))
    }

    #[derive(Serialize)]
    struct Record {
        step: u64,
        loss: f64,
    }

    #[test]
    fn records_are_lines_in_their_own_order() {
        let path = file("lines");
        let mut log = MetricsLog::create(&path).unwrap();
        log.append(&Record { step: 1, loss: 0.5 }).unwrap();
        log.append(&Record { step: 2, loss: f64::NAN }).unwrap();
        assert!(matches!(log.append(&[1, 2]), Err(Error::NotAnObject { found: "an array" })));
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"loss\":null}\n");
        assert_eq!(read_metrics(&path).unwrap()[0]["loss"], json!(0.5));
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn resuming_drops_what_came_after_the_checkpoint_and_a_torn_line() {
        let path = file("resume");
        fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"st").unwrap();
        assert_eq!(read_metrics(&path).unwrap().len(), 3);
        let mut log = MetricsLog::resume(&path, |record| record["step"].as_u64() <= Some(2)).unwrap();
        log.append(&json!({"step": 3})).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n");
        fs::remove_file(&path).unwrap();
        MetricsLog::resume(&path, |_| true).unwrap().append(&json!({"step": 1})).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"step\":1}\n");
        fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_bad_line_is_named() {
        let path = file("bad");
        fs::write(&path, "{}\n[1]\n").unwrap();
        let err = read_metrics(&path).unwrap_err();
        assert!(err.to_string().contains(".jsonl:2: "), "{err}");
        assert!(MetricsLog::resume(&path, |_| true).is_err());
        fs::remove_file(path).unwrap();
    }
}
