//! The tour in `docs/tour` is typed as it stands, and answers as the page says.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{Done, Folder};
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the page's comment promises, for a debug build.
const QUICKER: &str = "--set data.train=test.npz --set train.epochs=3";

/// Commands whose numbers depend on neither time nor training.
const EXACT: [&str; 2] = ["halfmode data inspect ", "halfmode plan "];

/// A fenced block: its language and its lines.
struct Block<'a> {
    language: &'a str,
    lines: Vec<&'a str>,
}

fn blocks(page: &str) -> Vec<Block<'_>> {
    let mut blocks = Vec::new();
    let mut lines = page.lines();
    while let Some(line) = lines.next() {
        if let Some(language) = line.strip_prefix("```") {
            blocks.push(Block { language, lines: lines.by_ref().take_while(|line| *line != "```").collect() });
        }
    }
    blocks
}

/// A command and the lines that the page shows below it.
struct Step<'a> {
    command: &'a str,
    shown: Vec<&'a str>,
}

fn steps<'a>(blocks: &[Block<'a>]) -> Vec<Step<'a>> {
    let mut steps: Vec<Step<'a>> = Vec::new();
    for line in blocks.iter().filter(|it| it.language == "console").flat_map(|it| &it.lines) {
        match line.strip_prefix("$ ") {
            Some(command) => steps.push(Step { command, shown: Vec::new() }),
            None => steps.last_mut().unwrap().shown.push(line),
        }
    }
    steps
}

/// Runs the program as typed; with `interrupt`, presses Ctrl-C after its first epoch.
fn run(folder: &Folder, command: &str, interrupt: bool) -> Done {
    let mut arguments: Vec<&str> = command.strip_prefix("halfmode ").unwrap().split_whitespace().collect();
    if command.starts_with("halfmode train tour.toml") {
        arguments.extend(QUICKER.split_whitespace());
    }
    let mut program = Command::new(env!("CARGO_BIN_EXE_halfmode"));
    program.current_dir(&folder.path).args(arguments).args(["--threads", "2"]);
    program.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    if !interrupt {
        return Done::of(command, program.output().unwrap());
    }
    let mut child = program.spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    while !text.contains("epoch 1/") {
        assert_ne!(stderr.read_line(&mut text).unwrap(), 0, "{text}");
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    stderr.read_to_string(&mut text).unwrap();
    let mut done = Done::of(command, child.wait_with_output().unwrap());
    done.stderr = text;
    done
}

/// A line with every number a `#` and every gap one space.
fn form(line: &str) -> String {
    let numbers = line.chars().map(|it| if it.is_ascii_digit() || it == '.' { '#' } else { it });
    let mut text = String::new();
    for letter in numbers {
        if !(matches!(letter, '#' | ' ') && text.ends_with(letter)) {
            text.push(letter);
        }
    }
    // A slow machine needs minutes.
    text.replace("# min # s", "# s")
}

/// Every shown line is in the output, in order.
fn assert_shown(step: &Step<'_>, done: &Done) {
    let exact = EXACT.iter().any(|it| step.command.starts_with(it));
    let read = |line: &str| if exact { line.to_owned() } else { form(line) };
    // Talk comes before results.
    let output = format!("{}{}", done.stderr, done.stdout);
    let mut lines = output.lines().map(read);
    for line in step.shown.iter().filter(|line| !matches!(**line, "…" | "^C")) {
        let wanted = read(line);
        assert!(
            lines.any(|it| it == wanted),
            "$ {}\ndoes not say, or not in this place:\n{line}\nbut\n{output}",
            step.command
        );
    }
}

fn tour() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/tour")
}

/// What stands between backticks in a text.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

#[test]
fn the_tour_is_what_happens() {
    let page = fs::read_to_string(tour().join("README.md")).unwrap();
    assert!(page.contains(QUICKER));
    let blocks = blocks(&page);
    let folder = Folder::new("tour");
    for block in blocks.iter().filter(|it| it.language == "toml") {
        folder.write("tour.toml", &block.lines.join("\n"));
    }
    let steps = steps(&blocks);
    assert!(steps.len() >= 12, "{}", steps.len());
    for step in &steps {
        if let Some(files) = step.command.strip_prefix("cmp ") {
            let bytes: Vec<_> = files.split_whitespace().map(|file| fs::read(folder.join(file)).unwrap()).collect();
            assert!(bytes[0] == bytes[1], "{} differ", files);
            continue;
        }
        let interrupt = step.shown.contains(&"^C");
        let done = run(&folder, step.command, interrupt).exits(if interrupt { 130 } else { 0 });
        assert_shown(step, &done);
    }

    let table = page.lines().filter_map(|line| line.strip_prefix("| `")?.split(" | ").next());
    let in_run = table.flat_map(|cell| cell.split(", ")).map(|name| format!("runs/tour/{}", name.trim_matches('`')));
    let named = names(&page).filter(|name| name.starts_with("runs/")).map(str::to_owned);
    let files: Vec<String> = in_run.chain(named).collect();
    assert!(files.len() >= 12, "{files:?}");
    for file in files {
        assert!(folder.join(&file).exists(), "{file}");
    }
}

#[test]
fn pictures_and_pages_are_there_and_small() {
    let page = fs::read_to_string(tour().join("README.md")).unwrap();
    let links: Vec<&str> = page.split("](").skip(1).filter_map(|rest| rest.split(')').next()).collect();
    assert!(links.len() >= 6, "{links:?}");
    let mut total = 0;
    for link in links {
        let path = tour().join(link);
        assert!(path.exists(), "{link}");
        if !link.ends_with(".md") && path.is_file() {
            let bytes = fs::metadata(&path).unwrap().len();
            assert!(bytes < 150_000, "{link}: {bytes} bytes");
            total += bytes;
        }
    }
    assert!(total < 600_000, "{total} bytes");
}
