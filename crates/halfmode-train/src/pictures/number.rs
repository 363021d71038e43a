//! Numbers as short text, the same in every picture.

/// `value` with up to `digits` significant digits, trailing zeros removed: `0.0163`, `1.2e-7`.
pub(super) fn compact(value: f64, digits: usize) -> String {
    if value.is_nan() {
        return "nan".to_owned();
    }
    if value.is_infinite() {
        return if value > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    if value == 0.0 {
        return "0".to_owned();
    }
    let digits = digits.max(1);
    // The exponent after rounding: 0.99996 with four digits is 1, not 0.10000e1.
    let scientific = format!("{value:.*e}", digits - 1);
    let Some((mantissa, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if !(-4..6).contains(&exponent) {
        return format!("{}e{exponent}", trim_zeros(mantissa));
    }
    let decimals = usize::try_from(digits as i32 - 1 - exponent).unwrap_or(0);
    trim_zeros(&format!("{value:.decimals$}")).to_owned()
}

/// Bytes in the largest binary unit that leaves a number of at least one: `86.0 KiB`.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = UNITS[0];
    for next in &UNITS[1..] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == UNITS[0] { format!("{count} B") } else { format!("{value:.1} {unit}") }
}

/// A duration as a person says it: `0.42 s`, `37.2 s`, `4 min 12 s`, `2 h 03 min`.
pub(super) fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "unknown".to_owned();
    }
    if seconds < 10.0 {
        return format!("{} s", compact(seconds, 3));
    }
    if seconds < 59.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    let (hours, minutes, rest) = (whole / 3600, whole / 60 % 60, whole % 60);
    if hours == 0 { format!("{minutes} min {rest:02} s") } else { format!("{hours} h {minutes:02} min") }
}

fn trim_zeros(text: &str) -> &str {
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compact_keeps_significant_digits_only() {
        let cases = [
            (0.0, "0"),
            (1.0, "1"),
            (-12.5, "-12.5"),
            (0.016_32, "0.01632"),
            (0.999_96, "1"),
            (123_456.0, "123456"),
            (65536.0, "65536"),
            (1_234_567.0, "1.235e6"),
            (1.2e-7, "1.2e-7"),
            (-0.000_123_44, "-0.0001234"),
            (f64::NAN, "nan"),
            (f64::NEG_INFINITY, "-inf"),
        ];
        for (value, text) in cases {
            assert_eq!(compact(value, 4), text);
        }
        assert_eq!(compact(5e-324, 1), "5e-324");
    }

    #[test]
    fn bytes_and_durations_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(86016), "84.0 KiB");
        assert_eq!(bytes(u64::MAX), "16384.0 PiB");
        assert_eq!(duration(0.42), "0.42 s");
        assert_eq!(duration(37.25), "37.2 s");
        assert_eq!(duration(59.96), "1 min 00 s");
        assert_eq!(duration(252.0), "4 min 12 s");
        assert_eq!(duration(7380.0), "2 h 03 min");
        assert_eq!(duration(f64::NAN), "unknown");
    }
}
