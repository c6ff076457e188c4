//! The effective configuration of a containerd: config.toml and its imports, as far as it concerns mirrors.
//!
//! | | containerd 1.x | containerd 2.x |
//! |---|---|---|
//! | one plugin section in several files | the last file's section replaces the others | merged key by key |
//! | files of an older configuration version | short plugin names without `version = 2` | each file is migrated first |
//!
//! Both ignore sections that they do not know.

#![allow(clippy::disallowed_methods, reason = "runs in commands, and on threads for blocking work")]

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use toml::{Table, Value};

/// The version of the containerd that reads the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
}

/// One file of the configuration.
#[derive(Debug, Clone)]
pub struct File {
    pub path: PathBuf,
    pub table: Table,
}

/// The settings that concern mirrors.
#[derive(Debug, Clone, Default)]
pub struct Daemon {
    /// The CRI plugin's `config_path`.
    pub config_path: Option<Value>,
    /// `registry.mirrors` has entries.
    pub has_mirrors: bool,
    /// `registry.configs` has entries with TLS.
    pub has_tls_configs: bool,
    pub cri_disabled: bool,
    /// A setting that makes containerd 2.1 and later pull in the CRI plugin, as older versions do, instead of in the
    /// transfer service.
    pub local_pull_setting: Option<&'static str>,
    /// The socket in the configuration.
    pub socket: Option<PathBuf>,
    /// A plugin name, of a section or in `disabled_plugins`, with which containerd does not start.
    pub misnamed_plugin: Option<String>,
    /// Files whose `config_path` for the CRI plugin is lost, because the section of a later file replaces theirs.
    pub replaced: Vec<PathBuf>,
    /// Sections with a `config_path` that this containerd does not read.
    pub misplaced: Vec<(PathBuf, String)>,
    /// The version of the configuration format.
    pub config_version: i64,
}

/// Why a configuration cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
    #[error("{path}: not valid TOML: {problem}")]
    NotToml { path: PathBuf, problem: String },
}

/// The plugin sections with registry settings: the CRI plugin up to configuration version 2, its images plugin since
/// version 3, and the transfer service.
const CRI_1: &str = "io.containerd.grpc.v1.cri";
const CRI_2: &str = "io.containerd.cri.v1.images";
const TRANSFER: &str = "io.containerd.transfer.v1.local";

/// The first configuration version with full plugin names.
const FULL_NAMES_VERSION: i64 = 2;

/// The first configuration version in which the image settings of the CRI plugin have a section of their own.
const IMAGES_SECTION_VERSION: i64 = 3;

impl Version {
    /// A guess from the configuration, for a containerd whose `--version` cannot be run.
    pub fn guessed(main: &File) -> Self {
        match config_version(&main.table) {
            Some(4..) => Self { major: 2, minor: 4 },
            Some(3) => Self { major: 2, minor: 2 },
            _ => Self { major: 1, minor: 7 },
        }
    }

    /// Merges the sections of a plugin in several files.
    pub fn merges_sections(self) -> bool {
        self.major >= 2
    }

    /// Pulls of the CRI plugin use the transfer service.
    pub fn uses_transfer_service(self) -> bool {
        self >= Self { major: 2, minor: 1 }
    }

    /// Without a `config_path`, reads two default directories.
    pub fn has_default_path(self) -> bool {
        self >= Self { major: 2, minor: 2 }
    }

    /// The newest configuration version that it supports; 1.x also starts with newer ones.
    pub fn newest_config(self) -> i64 {
        match self {
            Self { major: ..=1, .. } => 2,
            Self { major: 2, minor: ..=3 } => 3,
            _ => 4,
        }
    }

    /// The plugin section whose registry settings it reads.
    pub fn section(self, config_version: i64) -> &'static str {
        match (self.merges_sections(), config_version) {
            (true, IMAGES_SECTION_VERSION..) => CRI_2,
            (false, ..FULL_NAMES_VERSION) => "cri",
            _ => CRI_1,
        }
    }
}

impl PartialOrd for Version {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some((self.major, self.minor).cmp(&(other.major, other.minor)))
    }
}

impl FromStr for Version {
    type Err = String;

    /// Parses "1.7", "v2.1.3", or the output of `containerd --version`.
    fn from_str(text: &str) -> Result<Self, String> {
        let words = text.split_whitespace().map(|word| word.trim_start_matches('v'));
        let mut parsed = words.filter_map(|word| {
            let mut numbers = word.split(['.', '-', '~', '+']);
            let major = numbers.next()?.parse().ok()?;
            Some(Self { major, minor: numbers.next()?.parse().ok()? })
        });
        parsed.next_back().ok_or_else(|| format!("\"{text}\" is not a valid version: expected one such as 1.7 or 2.1"))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The file and its imports, in the order in which containerd merges them. A missing main file is empty, as for
/// containerd. At a missing import, 2.x stops reading and 1.x does not start.
pub fn load(path: &Path, version: Version) -> Result<Vec<File>, LoadError> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let mut files: Vec<File> = Vec::new();
    let mut seen = HashSet::new();
    let mut pending = std::collections::VecDeque::from([path.to_owned()]);
    while let Some(path) = pending.pop_front() {
        if !seen.insert(path.clone()) {
            continue;
        }
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && version.merges_sections() => break,
            text => text.map_err(|e| LoadError::Io(path.clone(), e))?,
        };
        let file = parse(&path, &text)?;
        pending.extend(imports(&file, version));
        files.push(file);
    }
    Ok(files)
}

/// Parses the text of a file, without its imports.
pub fn parse(path: &Path, text: &str) -> Result<File, LoadError> {
    let not_toml = |error: toml::de::Error| {
        let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        LoadError::NotToml { path: path.to_owned(), problem: format!("line {line}: {}", error.message()) }
    };
    Ok(File { path: path.to_owned(), table: text.parse().map_err(not_toml)? })
}

/// 1.x resolves patterns from its working directory, which is the root directory for services.
fn imports(file: &File, version: Version) -> Vec<PathBuf> {
    let listed = file.table.get("imports").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let parent = file.path.parent().unwrap_or(Path::new("/"));
    let resolved = listed.flat_map(|import| {
        let is_pattern = import.contains('*');
        let parent = if is_pattern && !version.merges_sections() { Path::new("/") } else { parent };
        let path = parent.join(import);
        match is_pattern.then(|| glob::glob(&path.to_string_lossy())) {
            Some(found) => found.into_iter().flatten().flatten().collect(),
            None => vec![path],
        }
    });
    resolved.collect()
}

impl Daemon {
    /// The settings that containerd of that version reads from these files.
    pub fn read(files: &[File], version: Version) -> Self {
        if version.merges_sections() {
            Self::with_merged_sections(files, version)
        } else {
            Self::with_last_section(files)
        }
    }

    /// 1.x: the last file with a section of a plugin replaces it whole. The last `version` applies to all files.
    fn with_last_section(files: &[File]) -> Self {
        let version = files.iter().filter_map(|file| config_version(&file.table)).next_back().unwrap_or(1);
        let section = Version { major: 1, minor: 7 }.section(version);
        let sections: Vec<_> = files.iter().filter_map(|file| Some((file, plugin(&file.table, section)?))).collect();
        let last = sections.last().map(|(_, section)| *section);
        let mut daemon = Self::from_registry(last.and_then(|section| table(section, "registry")));
        daemon.config_version = version;
        daemon.read_top_level(files, if version < FULL_NAMES_VERSION { "cri" } else { CRI_1 });
        // containerd 1.x only starts if each is io.containerd.KIND.v1.NAME.
        let is_full = |name: &&str| name.starts_with("io.containerd.") && name.splitn(4, '.').count() == 4;
        if version >= FULL_NAMES_VERSION {
            let sections = files.iter().filter_map(|file| table(&file.table, "plugins"));
            let named = disabled(files).chain(sections.flat_map(|plugins| plugins.keys().map(String::as_str)));
            daemon.misnamed_plugin = named.into_iter().find(|name| !is_full(name)).map(str::to_owned);
        }
        let has_path = |section: &Table| registry_path(section).is_some();
        if daemon.config_path.is_none() {
            let lost = sections.iter().filter(|(_, section)| has_path(section));
            daemon.replaced = lost.map(|(file, _)| file.path.clone()).collect();
        }
        daemon.misplaced = misplaced(files, |_| section);
        daemon
    }

    /// 2.x: each file is migrated to the newest version, then all are merged key by key.
    fn with_merged_sections(files: &[File], version: Version) -> Self {
        let mut images = Table::new();
        for file in files {
            let file_version = config_version(&file.table).unwrap_or(1);
            let mut migrated = plugin(&file.table, CRI_2).cloned().unwrap_or_default();
            let old =
                [plugin(&file.table, CRI_1), plugin(&file.table, "cri").filter(|_| file_version < FULL_NAMES_VERSION)];
            // Only older files are migrated: in a file of the newest version, containerd ignores the old sections.
            if file_version < version.newest_config()
                && let Some(old) = old.into_iter().flatten().next_back()
            {
                migrate_section(old, &mut migrated);
            }
            merge(&mut images, &migrated);
        }
        let mut daemon = Self::from_registry(table(&images, "registry"));
        daemon.config_version = files.first().and_then(|file| config_version(&file.table)).unwrap_or(1);
        daemon.read_top_level(files, CRI_1);
        daemon.cri_disabled |= disabled(files).any(|name| name == CRI_2 || name == "cri");
        daemon.misnamed_plugin = disabled(files)
            .find(|name| !name.contains('.') && daemon.config_version >= FULL_NAMES_VERSION)
            .map(str::to_owned);
        daemon.local_pull_setting = local_pull_setting(&images);
        daemon.misplaced = misplaced(files, |file| version.section(config_version(&file.table).unwrap_or(1)));
        daemon
    }

    fn from_registry(registry: Option<&Table>) -> Self {
        let Some(registry) = registry else { return Self::default() };
        let has = |key| table(registry, key).is_some_and(|table| !table.is_empty());
        let with_tls = |config: &Value| config.get("tls").is_some();
        Self {
            config_path: registry.get("config_path").filter(|path| path.as_str() != Some("")).cloned(),
            has_mirrors: has("mirrors"),
            has_tls_configs: table(registry, "configs").is_some_and(|configs| configs.values().any(with_tls)),
            ..Self::default()
        }
    }

    fn read_top_level(&mut self, files: &[File], cri: &str) {
        self.cri_disabled = disabled(files).any(|name| name == cri);
        let mut addresses = files.iter().filter_map(|file| {
            let grpc = table(&file.table, "grpc").and_then(|grpc| grpc.get("address"));
            let server = plugin(&file.table, "io.containerd.server.v1.grpc").and_then(|server| server.get("address"));
            server.or(grpc)?.as_str()
        });
        self.socket = addresses.rfind(|address| !address.is_empty()).map(PathBuf::from);
    }
}

/// Migrates an old section of the CRI plugin as containerd 2.x does.
fn migrate_section(old: &Table, images: &mut Table) {
    for key in ["registry", "max_concurrent_downloads", "image_pull_with_sync_fs"] {
        images.extend(old.get(key).map(|value| (key.to_owned(), value.clone())));
    }
    for key in ["disable_snapshot_annotations", "discard_unpacked_layers"] {
        let value = table(old, "containerd").and_then(|containerd| containerd.get(key));
        images.extend(value.map(|value| (key.to_owned(), value.clone())));
    }
}

fn local_pull_setting(images: &Table) -> Option<&'static str> {
    let is = |key: &str, value: bool| images.get(key).and_then(Value::as_bool) == Some(value);
    let registry = table(images, "registry");
    let has = |key: &str| registry.and_then(|registry| table(registry, key)).is_some_and(|table| !table.is_empty());
    let downloads = images.get("max_concurrent_downloads").and_then(Value::as_integer);
    [
        ("use_local_image_pull", is("use_local_image_pull", true)),
        ("disable_snapshot_annotations", is("disable_snapshot_annotations", false)),
        ("discard_unpacked_layers", is("discard_unpacked_layers", true)),
        ("registry.mirrors", has("mirrors")),
        ("registry.configs", has("configs")),
        ("registry.auths", has("auths")),
        ("max_concurrent_downloads", downloads.is_some_and(|count| count != 3)),
        ("image_pull_with_sync_fs", is("image_pull_with_sync_fs", true)),
    ]
    .into_iter()
    .find_map(|(name, set)| set.then_some(name))
}

fn config_version(table: &Table) -> Option<i64> {
    table.get("version").and_then(Value::as_integer).filter(|version| *version != 0)
}

fn table<'a>(table: &'a Table, key: &str) -> Option<&'a Table> {
    table.get(key).and_then(Value::as_table)
}

fn plugin<'a>(file: &'a Table, name: &str) -> Option<&'a Table> {
    table(table(file, "plugins")?, name)
}

fn registry_path(section: &Table) -> Option<&str> {
    table(section, "registry")?.get("config_path")?.as_str().filter(|path| !path.is_empty())
}

fn disabled(files: &[File]) -> impl Iterator<Item = &str> {
    let lists = files.iter().filter_map(|file| file.table.get("disabled_plugins")?.as_array());
    lists.flatten().filter_map(Value::as_str)
}

/// Merges plugin sections as containerd does: tables by key, other values are replaced.
fn merge(into: &mut Table, from: &Table) {
    for (key, value) in from {
        match (into.get_mut(key), value) {
            (Some(Value::Table(into)), Value::Table(from)) => merge(into, from),
            _ => drop(into.insert(key.clone(), value.clone())),
        }
    }
}

/// Every `config_path` in a section that containerd does not read.
fn misplaced<'a>(files: &'a [File], section: impl Fn(&File) -> &'a str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for file in files {
        for (name, plugin) in table(&file.table, "plugins").into_iter().flatten() {
            let Some(plugin) = plugin.as_table() else { continue };
            let is_cri = [CRI_1, CRI_2, "cri"].contains(&name.as_str());
            if is_cri && registry_path(plugin).is_some() && name != section(file) {
                found.push((file.path.clone(), format!("[plugins.\"{name}\".registry]")));
            }
            if name != TRANSFER && plugin.contains_key("config_path") {
                found.push((file.path.clone(), format!("[plugins.\"{name}\"]")));
            }
        }
        for key in ["registry", "config_path"] {
            let value = file.table.get(key);
            if value.is_some_and(|value| value.is_str() || value.get("config_path").is_some()) {
                found.push((file.path.clone(), format!("\"{key}\" at the top")));
            }
        }
    }
    found
}
