//! The shared secret, kept out of logs, and the file it lives in when nobody gave one.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io::{ErrorKind, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    str::FromStr,
};

use anyhow::{Context, bail};

/// As RFC 7518 has it: an HS256 key as long as its hash.
const MIN_BYTES: usize = 32;

/// A secret for HS256, long enough. Its text is the key as it stands.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// A random one, as 64 hexadecimal digits.
    pub fn random() -> Self {
        let bytes: [u8; 32] = rand::random();
        Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

impl FromStr for Secret {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() < MIN_BYTES {
            return Err(format!(
                "must be at least {MIN_BYTES} bytes, and has {}; `openssl rand -hex 32` makes a good one",
                text.len()
            ));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Reads the file's secret, made now if there is none. Of several processes that start at once one makes it, and all
/// read the same.
pub(super) fn load_or_create(file: &Path) -> anyhow::Result<Secret> {
    match fs::read_to_string(file) {
        Ok(text) => {
            // Nobody but us should be able to make tokens.
            let mode = fs::metadata(file)?.permissions().mode();
            if mode & 0o077 != 0 {
                bail!(
                    "others can read it (mode {:o}): chmod 600 it, or delete it to have a new key made",
                    mode & 0o777
                );
            }
            Secret::from_str(text.trim()).map_err(anyhow::Error::msg)
        }
        Err(error) if error.kind() == ErrorKind::NotFound => create(file),
        Err(error) => Err(error.into()),
    }
}

/// Writes the file whole under another name, and gives it its own only if that is still free.
fn create(file: &Path) -> anyhow::Result<Secret> {
    let dir = file.parent().context("it has no folder")?;
    fs::create_dir_all(dir)?;
    let draft = file.with_extension(format!("{}.tmp", uuid::Uuid::new_v4().simple()));
    let written = write_private(&draft, &Secret::random().0).and_then(|()| fs::hard_link(&draft, file));
    let removed = fs::remove_file(&draft);
    match written {
        // Somebody was faster: theirs is the key.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => return Err(error.into()),
        Ok(()) => File::open(dir)?.sync_all()?,
    }
    removed?;
    load_or_create(file)
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{text}")?;
    file.sync_all()
}
