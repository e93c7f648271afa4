//! SQL stores: connections, transactions and what their errors mean, on SQLite, PostgreSQL and MySQL/MariaDB.
//!
//! - SQLite has one connection a database: writers take turns in our queue and not in its busy loop. Commits are
//!   synced (WAL, `synchronous=FULL`), so that what was accepted survives a power cut; batching pays for it.
//! - Transactions are READ COMMITTED on the servers (MySQL's default would read a snapshot older than the lock that
//!   it waited for), set once a connection, and IMMEDIATE on SQLite.
//! - A deadlock, a lock timeout or a serialization failure is repeated here and seen by nobody.

use std::{future::Future, pin::Pin, time::Duration};

use async_trait::async_trait;
use sea_orm::{
    ConnectOptions, ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, ExecResult,
    QueryResult, RuntimeErr, SqlErr, SqliteTransactionMode, Statement, TransactionOptions, TransactionTrait,
    sqlx::{Connection as _, Executor as _},
};

use crate::chance;

/// What is asked of a server is given up after this, a transaction as a whole. Without an end, a connection that a dead
/// machine left behind would hold its caller for as long as TCP hopes, which is a quarter of an hour. Longer than any
/// caller waits.
const PATIENCE: Duration = Duration::from_secs(30);

/// Statements that a connection keeps parsed. A service has up to ten or two dozen sizes of some dozen statements (see
/// [`chunks`]); with fewer places than that, each would be parsed again whenever it comes.
const TEXTS: usize = 256;

/// The same of MySQL and MariaDB, which refuse further ones beyond 16,382 of a server's connections together
/// (`max_prepared_stmt_count`): four services in two replicas with all their connections stay below it.
const MYSQL_TEXTS: usize = 120;

/// A server's connection that nobody used for so long is tried before it is used again. Trying it each time would be one
/// more round trip for every transaction; never, and after a server's restart every connection would fail once. Under load
/// none is tried: a machine that went away without a word is noticed by [`PATIENCE`].
const UNTRIED: Duration = Duration::from_millis(500);

/// Rows that SQLite's thread reads ahead. With fewer places than a batch has rows, it would stop and be woken in between.
const ROWS_AHEAD: usize = 1_024;

/// How often a transaction that lost against another is begun again.
const ATTEMPTS: u32 = 10;

/// What a store's transaction can end in.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database did not do it.
    #[error("database: {0}")]
    Db(#[from] DbErr),
    /// The domain refused.
    #[error(transparent)]
    Domain(#[from] proto::Error),
}

impl From<Error> for proto::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Db(error) => fault(error),
            Error::Domain(error) => error,
        }
    }
}

/// A database error as the caller sees it: not available. The details go to the log.
pub fn fault(error: DbErr) -> proto::Error {
    proto::Error::dependency("the database", error)
}

/// Opens a database by URL: `sqlite://path`, `postgres://…` or `mysql://…`. Does not migrate.
pub async fn connect(url: &str) -> Result<DatabaseConnection, DbErr> {
    let mut options = ConnectOptions::new(url);
    options.sqlx_logging(false).acquire_timeout(Duration::from_secs(5)).connect_timeout(Duration::from_secs(5));
    if url.starts_with("sqlite:") {
        options.max_connections(1).min_connections(1).idle_timeout(None).max_lifetime(None);
        // It cannot go away, and everything that is asked of it is a switch to its thread and back.
        options.test_before_acquire(false);
        // When there is no room, SQLite rolls back by itself. Its driver then takes the next transactions for parts of one
        // that nobody ever commits: they would be seen here and lost with this connection. One that was asked for and
        // not awaited does not show here; SQLite's thread takes it back by itself when it finds nobody to tell.
        options.map_sqlx_sqlite_pool_opts(|pool| {
            pool.after_release(|connection, _| {
                Box::pin(async move {
                    if connection.is_in_transaction() {
                        // Answered after a rollback that was only asked for.
                        connection.ping().await?;
                    }
                    Ok(!connection.is_in_transaction())
                })
            })
        });
        options.map_sqlx_sqlite_opts(|o| {
            o.create_if_missing(true)
                .foreign_keys(false)
                .busy_timeout(Duration::from_secs(10))
                .row_buffer_size(ROWS_AHEAD)
                .statement_cache_capacity(TEXTS)
                .pragma("journal_mode", "WAL")
                .pragma("synchronous", "FULL")
                .pragma("cache_size", "-4000")
                .pragma("wal_autocheckpoint", "4000")
        });
    } else {
        options.max_connections(16).min_connections(1).test_before_acquire_if_idle_for(UNTRIED);
        // Every statement of ours looks rows up by a key. A table that was empty when its plan was made is still
        // scanned when it has a hundred thousand rows, for as long as nobody has analysed it: a sale is over by then.
        // And for the same reason no plan is better for knowing the parameters: planning a list of 512 keys anew each time
        // is a fifth of running it.
        let settings = [
            ("enable_seqscan", "off"),
            ("plan_cache_mode", "force_generic_plan"),
            ("default_transaction_isolation", "read committed"),
        ];
        options.map_sqlx_postgres_opts(move |o| o.options(settings).statement_cache_capacity(TEXTS));
        options.map_sqlx_mysql_opts(|o| o.statement_cache_capacity(MYSQL_TEXTS));
        options.map_sqlx_mysql_pool_opts(|pool| {
            pool.after_connect(|connection, _| {
                Box::pin(async move {
                    connection.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED").await?;
                    Ok(())
                })
            })
        });
    }
    sea_orm::Database::connect(options).await
}

/// The same server, another database. Panics at what is no URL.
pub fn with_database(base: &str, name: &str) -> String {
    let (scheme, rest) = base.split_once("://").expect("a URL");
    let (rest, query) = rest.split_once('?').map_or((rest, String::new()), |(r, q)| (r, format!("?{q}")));
    let authority = rest.split('/').next().unwrap_or(rest);
    format!("{scheme}://{authority}/{name}{query}")
}

/// A database as the stores use it: everything that is asked of it has an end, in a transaction or not.
#[derive(Clone, Debug)]
pub struct Database(DatabaseConnection);

impl From<DatabaseConnection> for Database {
    fn from(connection: DatabaseConnection) -> Self {
        Self(connection)
    }
}

#[async_trait]
impl ConnectionTrait for Database {
    fn get_database_backend(&self) -> DbBackend {
        self.0.get_database_backend()
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        self.in_time(self.0.execute_raw(statement)).await
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        self.in_time(self.0.execute_unprepared(sql)).await
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        self.in_time(self.0.query_one_raw(statement)).await
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        self.in_time(self.0.query_all_raw(statement)).await
    }

    fn support_returning(&self) -> bool {
        self.0.support_returning()
    }
}

impl Database {
    /// SQLite has no network, and its own limits.
    async fn in_time<T, E: From<DbErr>>(&self, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        if self.get_database_backend() == DbBackend::Sqlite {
            return work.await;
        }
        let late = |_| DbErr::Custom(format!("the server gave no answer within {PATIENCE:?}"));
        tokio::time::timeout(PATIENCE, work).await.map_err(late)?
    }

    async fn begin(&self) -> Result<DatabaseTransaction, DbErr> {
        if self.get_database_backend() == DbBackend::Sqlite {
            let sqlite_transaction_mode = Some(SqliteTransactionMode::Immediate);
            return self
                .0
                .begin_with_options(TransactionOptions { sqlite_transaction_mode, ..Default::default() })
                .await;
        }
        // In a task of its own, because a BEGIN whose caller goes away must be waited for all the same: the drivers do not
        // take back one that was sent and not answered. The next write on its connection would be told done, be part of
        // that transaction, and be lost with the connection.
        let connection = self.0.clone();
        let begun = tokio::spawn(async move { connection.begin().await }).await;
        begun.map_err(|error| DbErr::Custom(format!("a transaction was not begun: {error}")))?
    }
}

/// A boxed future that borrows a transaction.
pub type TxFuture<'c, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'c>>;

/// Runs `work` in a transaction: committed when it answers `Ok`, rolled back otherwise, begun again when it lost
/// against another. `work` may therefore run several times and must keep no effects of its own.
pub async fn transaction<T, F>(db: &Database, work: F) -> Result<T, Error>
where
    F: for<'c> Fn(&'c DatabaseTransaction) -> TxFuture<'c, T> + Send + Sync,
    T: Send,
{
    let mut attempt = 1;
    loop {
        match db.in_time(once(db, &work)).await {
            Err(Error::Db(error)) if attempt < ATTEMPTS && lost_against_another(&error) => {
                tracing::debug!(%error, attempt, "transaction begun again");
                metrics::counter!("seckill_sql_retries_total").increment(1);
                // Spread out, or the same two meet again.
                let jitter = chance::between(1, 5) * u64::from(attempt);
                tokio::time::sleep(Duration::from_millis(jitter)).await;
                attempt += 1;
            }
            result => return result,
        }
    }
}

async fn once<T, F>(db: &Database, work: &F) -> Result<T, Error>
where
    F: for<'c> Fn(&'c DatabaseTransaction) -> TxFuture<'c, T>,
{
    let tx = db.begin().await?;
    match work(&tx).await {
        Ok(value) => {
            tx.commit().await?;
            Ok(value)
        }
        Err(error) => {
            // The first error is the story; a failed rollback only means that the connection is gone.
            let _ = tx.rollback().await;
            Err(error)
        }
    }
}

/// Rows of one statement, at most. Some twenty columns each stay below every database's limit of parameters. The usual
/// batch (funnel, lanes, batchers) is as large, so that under load a batch is one statement.
const MOST_ROWS: usize = 512;
/// Keys of one statement, at most.
const MOST_KEYS: usize = 512;

/// Rows below which a statement costs more than what it writes: pieces have finer sizes there.
const FINE_ROWS: usize = 64;

/// Cuts rows into the pieces that one INSERT takes each. There are some two dozen sizes, so that as many texts serve
/// batches of every size: each text is parsed once a connection and kept. A text for every size would be parsed nearly
/// every time, and the kept ones take two kilobytes a row.
pub fn chunks<T>(mut rows: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let (chunk, rest) = rows.split_at(piece(rows.len())?);
        rows = rest;
        Some(chunk)
    })
}

/// The largest size of a piece that so many rows fill: a power of two, or a quarter, a half or three quarters more
/// than one among the fine ones.
fn piece(rows: usize) -> Option<usize> {
    let rows = rows.min(MOST_ROWS);
    let power = 1_usize << rows.checked_ilog2()?;
    let step = if rows < FINE_ROWS { (power / 4).max(1) } else { power };
    Some(rows - rows % step)
}

/// Cuts keys into the pieces that one list of `IN` takes each. Padded to powers of two with the last key, for the reason
/// of [`chunks`]: naming a key twice finds it once.
pub fn key_chunks<T: Clone>(keys: &[T]) -> impl Iterator<Item = Vec<T>> {
    keys.chunks(MOST_KEYS).map(|chunk| {
        let mut padded = chunk.to_vec();
        padded.resize(chunk.len().next_power_of_two(), chunk[chunk.len() - 1].clone());
        padded
    })
}

/// Whether an insert met a key that was there before.
pub fn is_duplicate(error: &DbErr) -> bool {
    matches!(error.sql_err(), Some(SqlErr::UniqueConstraintViolation(_)))
}

fn lost_against_another(error: &DbErr) -> bool {
    let (DbErr::Exec(RuntimeErr::SqlxError(source)) | DbErr::Query(RuntimeErr::SqlxError(source))) = error else {
        return false;
    };
    let Some(source) = source.as_database_error() else { return false };
    let code = source.code().unwrap_or_default();
    // PostgreSQL: serialization failure, deadlock. MySQL: deadlock (SQLSTATE 40001 too), lock wait timeout (HY000,
    // told by its text). SQLite: busy, busy snapshot.
    matches!(code.as_ref(), "40001" | "40P01" | "5" | "517") || source.message().contains("Lock wait timeout")
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{
            TcpListener, TcpStream,
            tcp::{OwnedReadHalf, OwnedWriteHalf},
        },
        sync::watch,
    };

    use super::*;
    use crate::testing::{TestDatabase, eventually};

    #[test]
    fn rows_are_cut_into_few_pieces_of_few_sizes_and_none_is_lost() {
        let mut sizes = std::collections::BTreeSet::new();
        for len in 0..=1_100 {
            let rows: Vec<usize> = (0..len).collect();
            let cut: Vec<&[usize]> = chunks(&rows).collect();
            assert_eq!(cut.concat(), rows);
            assert!(len >= FINE_ROWS || cut.len() <= 3, "{len} rows are {} pieces", cut.len());
            sizes.extend(cut.iter().map(|piece| piece.len()));
        }
        assert_eq!(sizes.len(), 23, "{sizes:?}");
        assert_eq!(sizes.last(), Some(&MOST_ROWS));
    }

    #[test]
    fn keys_are_padded_with_one_of_them() {
        assert_eq!(key_chunks::<u8>(&[]).count(), 0);
        assert_eq!(key_chunks(&[1, 2, 3]).collect::<Vec<_>>(), [[1, 2, 3, 3]]);
        let keys: Vec<usize> = (0..MOST_KEYS + 3).collect();
        let cut: Vec<Vec<usize>> = key_chunks(&keys).collect();
        assert_eq!(cut.iter().map(Vec::len).collect::<Vec<_>>(), [MOST_KEYS, 4]);
        let mut all = cut.concat();
        all.dedup();
        assert_eq!(all, keys);
    }

    /// A way to a server that can be shut: what is on it then waits.
    struct Gate {
        url: String,
        open: watch::Sender<bool>,
    }

    impl Gate {
        async fn before(database: &TestDatabase) -> Self {
            let (start, rest) = database.url.split_once('@').expect("a URL with a user");
            let (server, name) = rest.split_once('/').expect("a URL with a database");
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("{start}@{}/{name}", listener.local_addr().unwrap());
            let (open, gate) = watch::channel(true);
            let server = server.to_owned();
            tokio::spawn(async move {
                while let Ok((here, _)) = listener.accept().await {
                    let (from_here, to_here) = here.into_split();
                    let (from_there, to_there) = TcpStream::connect(&server).await.unwrap().into_split();
                    tokio::spawn(pass(from_here, to_there, gate.clone()));
                    tokio::spawn(pass(from_there, to_here, gate.clone()));
                }
            });
            Self { url, open }
        }

        /// The database behind it, with a connection that waits to be used, and is not tried first.
        async fn passed(&self) -> Database {
            let db = Database::from(connect(&self.url).await.unwrap());
            at_rest(&db).await;
            db
        }
    }

    /// Waits until a connection is back in the pool.
    async fn at_rest(db: &Database) {
        eventually("a connection at rest", async || {
            let idle = match db.get_database_backend() {
                DbBackend::Postgres => db.0.get_postgres_connection_pool().num_idle(),
                _ => db.0.get_mysql_connection_pool().num_idle(),
            };
            (idle > 0).then_some(())
        })
        .await;
    }

    async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut gate: watch::Receiver<bool>) {
        let mut bytes = [0; 4_096];
        while let Ok(count @ 1..) = from.read(&mut bytes).await {
            if gate.wait_for(|open| *open).await.is_err() || to.write_all(&bytes[..count]).await.is_err() {
                return;
            }
        }
    }

    async fn servers() -> Vec<TestDatabase> {
        let mut databases = crate::testing::databases().await;
        databases.retain(|database| database.kind != "sqlite");
        databases
    }

    async fn count(db: &impl ConnectionTrait, table: &str) -> i64 {
        let select = Statement::from_string(db.get_database_backend(), format!("SELECT COUNT(*) AS n FROM {table}"));
        db.query_one_raw(select).await.unwrap().unwrap().try_get("", "n").unwrap()
    }

    /// A machine that goes away says nothing, and neither does TCP for a quarter of an hour.
    #[tokio::test]
    async fn a_server_that_says_nothing_more_is_not_waited_for_for_ever() {
        for database in servers().await {
            let gate = Gate::before(&database).await;
            for in_transaction in [false, true] {
                let db = gate.passed().await;
                gate.open.send_replace(false);
                tokio::time::pause();
                let error = if in_transaction {
                    transaction(&db, |_| Box::pin(async { Ok(()) })).await.unwrap_err().to_string()
                } else {
                    db.execute_unprepared("SELECT 1").await.unwrap_err().to_string()
                };
                assert!(error.contains("no answer within 30s"), "{}: {error}", database.kind);
                tokio::time::resume();
                gate.open.send_replace(true);
            }
        }
    }

    /// What is told done is committed, though somebody went away whose BEGIN was on the connection's way before it.
    #[tokio::test]
    async fn a_transaction_that_is_given_up_while_it_begins_takes_no_later_write_with_it() {
        for database in servers().await {
            database.connection.execute_unprepared("CREATE TABLE told (id INTEGER PRIMARY KEY)").await.unwrap();
            let gate = Gate::before(&database).await;
            let db = gate.passed().await;
            gate.open.send_replace(false);
            let work = transaction(&db, |_| Box::pin(async { Ok(()) }));
            tokio::time::timeout(Duration::from_millis(100), work).await.unwrap_err();
            gate.open.send_replace(true);
            // The only connection is the one that began.
            at_rest(&db).await;
            db.execute_unprepared("INSERT INTO told VALUES (1)").await.unwrap();
            assert_eq!(count(&database.connection, "told").await, 1, "{}", database.kind);
        }
    }

    /// What waited for a lock must read what the lock's owner wrote: MySQL's own default would not, nor would a
    /// PostgreSQL database that somebody has set so.
    #[tokio::test]
    async fn a_transaction_of_a_server_reads_what_others_have_committed_since() {
        for database in servers().await {
            let name = database.url.rsplit('/').next().unwrap();
            if database.kind == "postgres" {
                let set = format!("ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'");
                database.connection.execute_unprepared(&set).await.unwrap();
            }
            let connection = connect(&database.url).await.unwrap();
            connection.execute_unprepared("CREATE TABLE readings (id INTEGER PRIMARY KEY)").await.unwrap();
            let seen = transaction(&connection.clone().into(), |tx| {
                let other = connection.clone();
                Box::pin(async move {
                    let before = count(tx, "readings").await;
                    other.execute_unprepared("INSERT INTO readings VALUES (1)").await?;
                    Ok([before, count(tx, "readings").await])
                })
            })
            .await
            .unwrap();
            assert_eq!(seen, [0, 1], "{}", database.kind);
        }
    }

    /// E21, on SQLite: what it does by itself when the disk is full must not cost what is committed later.
    #[tokio::test]
    async fn what_is_committed_after_sqlite_has_rolled_back_by_itself_is_on_disk() {
        let database = crate::testing::sqlite().await;
        let db = Database::from(database.connection.clone());
        let run = async |sql: &'static str, fails: bool| {
            transaction(&db, move |tx| {
                Box::pin(async move {
                    tx.execute_unprepared(sql).await?;
                    if fails { Err(Error::Domain(proto::Error::internal("no room"))) } else { Ok(()) }
                })
            })
            .await
        };
        run("CREATE TABLE rows_of_ours (id INTEGER PRIMARY KEY)", false).await.unwrap();
        run("ROLLBACK", true).await.unwrap_err();
        run("INSERT INTO rows_of_ours VALUES (1)", true).await.unwrap_err();
        run("INSERT INTO rows_of_ours VALUES (2)", false).await.unwrap();
        let other = connect(&database.url).await.unwrap();
        let all = Statement::from_string(DbBackend::Sqlite, "SELECT id FROM rows_of_ours");
        let seen = other.query_all_raw(all).await.unwrap();
        assert_eq!(seen.len(), 1, "another connection sees what was committed, and nothing else");
    }
}
