//! Text made safe for HTML and SVG.

/// `text` for use between tags and inside quoted attributes.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            '\n' | '\t' => safe.push(character),
            // XML has no way to write the other control characters.
            _ if character.is_control() => safe.push('\u{fffd}'),
            _ => safe.push(character),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::escape;

    #[test]
    fn markup_and_control_characters_are_disarmed() {
        assert_eq!(escape("<a href='x' b=\"y\">&\n"), "&lt;a href=&#39;x&#39; b=&quot;y&quot;&gt;&amp;\n");
        assert_eq!(escape("a\u{0}b\u{1b}"), "a\u{fffd}b\u{fffd}");
        assert_eq!(escape("‖u‖ ≤ ½"), "‖u‖ ≤ ½");
    }
}
