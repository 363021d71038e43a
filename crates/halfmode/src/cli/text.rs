//! Numbers and tables as text, and back.

use std::path::Path;

/// `1.21 GiB`.
pub(crate) fn bytes(n: usize) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = n as f64;
    let mut unit = "B";
    for next in units {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{n} B") } else { format!("{value:.2} {unit}") }
}

/// Bytes as users type them: `4GiB`, `500MB`, `8G` (1024³), `1048576`.
pub(crate) fn parse_bytes(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| format!("`{text}` is not a number of bytes, such as 4GiB"))?;
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "t" | "tib" => 1024f64.powi(4),
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        other => return Err(format!("`{other}` is not a unit of bytes; use KiB, MiB, GiB, TiB, kB, MB, GB or TB")),
    };
    let bytes = number * factor;
    if !(1.0..=1e18).contains(&bytes) {
        return Err(format!("`{text}` is not a size of memory"));
    }
    Ok(bytes as usize)
}

/// A path for people and for JSON, which has no bytes that are not text.
pub(crate) fn path(path: &Path) -> String {
    path.display().to_string()
}

/// `3 h 2 min`, `4 min 5 s`, `12.3 s`.
pub(crate) fn seconds(seconds: f64) -> String {
    let seconds = if seconds.is_finite() { seconds.max(0.0) } else { return "?".to_owned() };
    let whole = seconds as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole / 60 % 60),
    }
}

/// `17 071 489`.
pub(crate) fn thousands(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (idx, digit) in digits.chars().enumerate() {
        if idx > 0 && (digits.len() - idx).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// Rows as aligned columns: the first to the left, the others to the right.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|&cell| cell.to_owned()).collect();
    let all: Vec<&Vec<String>> = std::iter::once(&header).chain(rows).collect();
    let width =
        |col: usize| all.iter().filter_map(|row| row.get(col)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    for row in all {
        let cells =
            row.iter().zip(&widths).enumerate().map(|(col, (cell, &width))| {
                if col == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// The known name that is nearest to `word`, if one is near.
pub(crate) fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let (distance, name) =
        known.into_iter().map(|name| (edit_distance(word, name), name)).min_by_key(|&(distance, _)| distance)?;
    (distance <= 2.max(word.chars().count().max(name.chars().count()) / 2)).then_some(name)
}

/// Insertions, deletions and replacements from one word to another.
fn edit_distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, &b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_both_ways() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(3 << 29), "1.50 GiB");
        assert_eq!(parse_bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("500 MB"), Ok(500_000_000));
        assert_eq!(parse_bytes("8g"), Ok(8 << 30));
        for bad in ["", "GiB", "4 parsecs", "-1", "0", "1e400", "9999999999TiB", "1.2.3"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(thousands(17_071_489), "17 071 489");
        assert_eq!(thousands(12), "12");
        assert_eq!(seconds(3725.0), "1 h 2 min");
        assert_eq!(seconds(61.9), "1 min 1 s");
        assert_eq!(seconds(f64::NAN), "?");
    }

    #[test]
    fn the_nearest_name_is_near() {
        let known = ["n_modes", "n_layers", "hidden_channels"];
        assert_eq!(nearest("n_mode", known), Some("n_modes"));
        assert_eq!(nearest("hiden_chanels", known), Some("hidden_channels"));
        assert_eq!(nearest("zzzzzzzzzzzzzzz", known), None);
        assert_eq!((edit_distance("kitten", "sitting"), edit_distance("", "abc")), (3, 3));
    }
}
