//! Rust source as text: without comments, without strings, without tests.
//!
//! No parser: the checks need words and lines, and these need only know what is code.

/// `source` with comments blanked and the contents of strings and characters replaced by `~`;
/// every line keeps its place.
pub(crate) fn code_only(source: &str) -> String {
    Scrubber { rest: source, code: String::with_capacity(source.len()) }.run()
}

/// `code` (of [`code_only`]) with the items under `#[cfg(test)]` blanked.
pub(crate) fn without_tests(code: &str) -> String {
    let mut kept = code.to_owned();
    for marker in ["#[cfg(test)]", "#[cfg(all(test"] {
        let mut from = 0;
        while let Some(found) = kept[from..].find(marker) {
            let start = from + found;
            let end = item_end(&kept, start);
            let blank: String = kept[start..end].chars().map(|it| if it == '\n' { '\n' } else { ' ' }).collect();
            kept.replace_range(start..end, &blank);
            from = start + blank.len();
        }
    }
    kept
}

/// Lines of `code` that are not blank.
pub(crate) fn count_lines(code: &str) -> usize {
    code.lines().filter(|it| !it.trim().is_empty()).count()
}

/// The line numbers, from 1, at which `word` stands alone in `code`.
pub(crate) fn lines_with_word(code: &str, word: &str) -> Vec<usize> {
    let is_part = |it: char| it.is_alphanumeric() || it == '_';
    let stands_alone = |line: &str| {
        line.match_indices(word)
            .any(|(at, _)| !line[..at].ends_with(is_part) && !line[at + word.len()..].starts_with(is_part))
    };
    code.lines().zip(1..).filter(|(line, _)| stands_alone(line)).map(|(_, number)| number).collect()
}

/// The attributes in `code`, each with the number of the line where it begins.
pub(crate) fn attributes(code: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(at) = code[from..].find('#') {
        let start = from + at;
        from = start + 1;
        let body = code[start + 1..].trim_start_matches('!');
        if body.starts_with('[') {
            let open = code.len() - body.len();
            let end = closing(code, open);
            let line = code[..start].matches('\n').count() + 1;
            found.push((line, &code[start..end]));
            from = end;
        }
    }
    found
}

/// The end of the item that the attribute at `start` belongs to.
fn item_end(code: &str, start: usize) -> usize {
    let mut at = start;
    loop {
        let rest = &code[at..];
        at += rest.len() - rest.trim_start().len();
        if !code[at..].starts_with("#[") {
            break;
        }
        at = closing(code, at + 1);
    }
    match code[at..].find(['{', ';']).map(|it| at + it) {
        Some(brace) if code[brace..].starts_with('{') => closing(code, brace),
        Some(semicolon) => semicolon + 1,
        None => code.len(),
    }
}

/// The place behind the bracket that closes the one at `open`.
fn closing(code: &str, open: usize) -> usize {
    let mut depth = 0_usize;
    for (at, character) in code[open..].char_indices() {
        match character {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return open + at + character.len_utf8();
        }
    }
    code.len()
}

struct Scrubber<'a> {
    rest: &'a str,
    code: String,
}

impl Scrubber<'_> {
    fn run(mut self) -> String {
        while let Some(next) = self.rest.chars().next() {
            if self.rest.starts_with("//") {
                let length = self.rest.find('\n').unwrap_or(self.rest.len());
                self.blank(length, ' ');
            } else if self.rest.starts_with("/*") {
                self.blank(comment_length(self.rest), ' ');
            } else if let Some((opening, hashes)) = self.raw_string() {
                self.keep(opening);
                let close = format!("\"{}", "#".repeat(hashes));
                let length = self.rest.find(&close).unwrap_or(self.rest.len());
                self.blank(length, '~');
                self.keep(close.len());
            } else if next == '"' {
                self.keep(1);
                self.blank(quoted_length(self.rest, '"'), '~');
                self.keep(1);
            } else if next == '\'' && is_character(self.rest) {
                self.keep(1);
                self.blank(quoted_length(self.rest, '\''), '~');
                self.keep(1);
            } else {
                self.keep(next.len_utf8());
            }
        }
        self.code
    }

    /// The length of `r#"` and the like, and the number of its hashes.
    fn raw_string(&self) -> Option<(usize, usize)> {
        if self.code.ends_with(|it: char| it.is_alphanumeric() || it == '_') {
            return None;
        }
        let prefix = ["r", "br", "cr"]
            .into_iter()
            .find(|it| self.rest.strip_prefix(it).is_some_and(|rest| rest.starts_with(['"', '#'])))?;
        let body = &self.rest[prefix.len()..];
        let hashes = body.len() - body.trim_start_matches('#').len();
        body[hashes..].starts_with('"').then_some((prefix.len() + hashes + 1, hashes))
    }

    fn keep(&mut self, length: usize) {
        let (head, rest) = self.rest.split_at(length.min(self.rest.len()));
        self.code.push_str(head);
        self.rest = rest;
    }

    fn blank(&mut self, length: usize, with: char) {
        let (head, rest) = self.rest.split_at(length);
        self.code.extend(head.chars().map(|it| if it == '\n' { '\n' } else { with }));
        self.rest = rest;
    }
}

/// Length of the block comment that `text` begins with; block comments nest.
fn comment_length(text: &str) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < text.len() {
        if text[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if text[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += text[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    text.len()
}

/// Length of `text` up to the closing `quote`, which escapes may precede.
fn quoted_length(text: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (at, character) in text.char_indices() {
        if !is_escaped && character == quote {
            return at;
        }
        is_escaped = !is_escaped && character == '\\';
    }
    text.len()
}

/// Whether the quote that `text` begins with opens a character and not a lifetime.
fn is_character(text: &str) -> bool {
    let mut characters = text.chars().skip(1);
    let (first, second) = (characters.next(), characters.next());
    first == Some('\\') || second == Some('\'') && first != Some('\'')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_strings_are_not_code() {
        let source = "let a = \"// x \\\" y\"; // unsafe\n/* a /* b */ unsafe */ let b = 'c';\n";
        assert_eq!(
            code_only(source).lines().map(str::trim).collect::<Vec<_>>(),
            ["let a = \"~~~~~~~~~\";", "let b = '~';",]
        );
    }

    #[test]
    fn raw_strings_lifetimes_and_quotes() {
        let source = r###"let r = r##"a "# b"##; fn f<'a>(x: &'a str) { '\''; b'"'; br"x"; r#type; "é" }"###;
        let code = code_only(source);
        assert_eq!(code, r###"let r = r##"~~~~~~"##; fn f<'a>(x: &'a str) { '~~'; b'~'; br"~"; r#type; "~" }"###);
    }

    #[test]
    fn unfinished_source_ends() {
        for source in ["\"abc", "/* abc", "r#\"abc", "'\\", "#[allow(", "#[cfg(test)]", "#[cfg(test)] mod a {", "'"] {
            let code = code_only(source);
            let _ = (without_tests(&code), attributes(&code));
        }
    }

    #[test]
    fn tests_in_the_file_do_not_count() {
        let source = "\
//! Doc.

fn a() {} // one
/// Two.
fn b() {
    \"}\";
}
#[cfg(test)]
use x::y;
#[cfg(test)]
#[allow(unused, reason = \"r\")]
mod tests {
    fn c() { '}'; }
}
const D: () = ();
";
        let code = without_tests(&code_only(source));
        assert_eq!(count_lines(&code), 5);
        assert_eq!(code.lines().count(), source.lines().count());
    }

    #[test]
    fn words_stand_alone() {
        let code = "unsafe {}\nforbid(unsafe_code)\nnot_unsafe\n(unsafe)\n";
        assert_eq!(lines_with_word(code, "unsafe"), [1, 4]);
    }

    #[test]
    fn attributes_over_several_lines() {
        let code = "#![forbid(a)]\nfn f() {}\n#[allow(\n    b,\n    reason = \"~\"\n)]\nr#type";
        let found = attributes(code);
        assert_eq!(found[0], (1, "#![forbid(a)]"));
        assert_eq!(found[1].0, 3);
        assert!(found[1].1.ends_with("\"~\"\n)]"));
        assert_eq!(found.len(), 2);
    }
}
