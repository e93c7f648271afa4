//! Disposable backends for tests: every contract suite runs on each of them.
//!
//! SQLite needs nothing. PostgreSQL, MariaDB, Redis and NATS are used where their URL is in the environment, which
//! `cargo xtask test` sees to; with `SECKILL_TEST_REQUIRE_SERVERS=1` a missing one fails the test instead of being
//! passed over.

mod at_once;

use std::time::Duration;

use sea_orm::{ConnectionTrait, DatabaseConnection};

pub use at_once::{Back, at_once, within_a_step};

/// A fresh, empty database. A SQLite one is deleted with this value; a server's lives as long as the test server.
#[derive(Debug)]
pub struct TestDatabase {
    /// `sqlite`, `postgres` or `mariadb`.
    pub kind: &'static str,
    /// Where it is.
    pub url: String,
    /// Connected to it.
    pub connection: DatabaseConnection,
    _dir: Option<tempfile::TempDir>,
}

/// A server's URL from the environment; `None`, with a word on stderr, when it is not there and not required.
pub fn server(variable: &str) -> Option<String> {
    match std::env::var(variable) {
        Ok(url) if !url.is_empty() => Some(url),
        _ if std::env::var("SECKILL_TEST_REQUIRE_SERVERS").is_ok_and(|v| v == "1") => {
            panic!("{variable} is not set, and the real servers are required")
        }
        _ => {
            eprintln!("{variable} is not set: passed over");
            None
        }
    }
}

/// A fresh SQLite database.
pub async fn sqlite() -> TestDatabase {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let url = format!("sqlite://{}/test.db", dir.path().display());
    let connection = crate::sql::connect(&url).await.expect("sqlite opens");
    TestDatabase { kind: "sqlite", url, connection, _dir: Some(dir) }
}

/// A fresh database on every kind of server there is.
pub async fn databases() -> Vec<TestDatabase> {
    let mut all = vec![sqlite().await];
    for (kind, variable) in [("postgres", "SECKILL_TEST_POSTGRES_URL"), ("mariadb", "SECKILL_TEST_MYSQL_URL")] {
        if let Some(base) = server(variable) {
            all.push(on_server(kind, &base).await);
        }
    }
    all
}

async fn on_server(kind: &'static str, base: &str) -> TestDatabase {
    let name = format!("test_{}", uuid::Uuid::new_v4().simple());
    let admin = crate::sql::connect(base).await.expect("the test server answers");
    admin.execute_unprepared(&format!("CREATE DATABASE {name}")).await.expect("a database can be created");
    admin.close().await.expect("the connection closes");
    let url = crate::sql::with_database(base, &name);
    let connection = crate::sql::connect(&url).await.expect("the new database answers");
    TestDatabase { kind, url, connection, _dir: None }
}

/// Waits until `check` answers something, or fails with what it was waiting for.
pub async fn eventually<T>(what: &str, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(value) = check().await {
            return value;
        }
        assert!(tokio::time::Instant::now() < deadline, "still waiting for: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
