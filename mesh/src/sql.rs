//! SQL stores: connections, transactions and what their errors mean, on SQLite, PostgreSQL and MySQL/MariaDB.
//!
//! - SQLite has one connection a database: writers take turns in our queue and not in its busy loop. Commits are
//!   synced (WAL, `synchronous=FULL`), so that what was accepted survives a power cut; batching pays for it.
//! - Transactions are READ COMMITTED on the servers (MySQL's default would read a snapshot older than the lock that
//!   it waited for) and IMMEDIATE on SQLite.
//! - A deadlock, a lock timeout or a serialization failure is repeated here and seen by nobody.

use std::{future::Future, pin::Pin, time::Duration};

use sea_orm::{
    ConnectOptions, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, IsolationLevel, RuntimeErr, SqlErr,
    SqliteTransactionMode, TransactionOptions, TransactionTrait, sqlx::Connection as _,
};

use crate::chance;

/// A transaction of a server that takes longer is given up. Without an end, a connection that a dead machine left behind
/// would hold its caller for as long as TCP hopes, which is a quarter of an hour. Longer than any caller waits.
const PATIENCE: Duration = Duration::from_secs(30);

/// Statements that a connection keeps parsed. A service has up to ten sizes of some dozen statements (see [`chunks`]); with
/// fewer places than that, each would be parsed again whenever it comes.
const TEXTS: usize = 256;

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
        // When there is no room, SQLite rolls back by itself. Its driver then takes the next transactions for parts of one
        // that nobody ever commits: they would be seen here and lost with this connection.
        options.map_sqlx_sqlite_pool_opts(|pool| {
            pool.after_release(|connection, _| {
                Box::pin(async move {
                    // Answered after a rollback that was only asked for.
                    connection.ping().await?;
                    Ok(!connection.is_in_transaction())
                })
            })
        });
        options.map_sqlx_sqlite_opts(|o| {
            o.create_if_missing(true)
                .foreign_keys(false)
                .busy_timeout(Duration::from_secs(10))
                .pragma("journal_mode", "WAL")
                .pragma("synchronous", "FULL")
                .pragma("cache_size", "-4000")
                .pragma("wal_autocheckpoint", "4000")
        });
    } else {
        options.max_connections(16).min_connections(1);
        // Every statement of ours looks rows up by a key. A table that was empty when its plan was made is still
        // scanned when it has a hundred thousand rows, for as long as nobody has analysed it: a sale is over by then.
        // And for the same reason no plan is better for knowing the parameters: planning a list of 512 keys anew each time
        // is a fifth of running it.
        let settings = [("enable_seqscan", "off"), ("plan_cache_mode", "force_generic_plan")];
        options.map_sqlx_postgres_opts(move |o| o.options(settings).statement_cache_capacity(TEXTS));
        options.map_sqlx_mysql_opts(|o| o.statement_cache_capacity(TEXTS));
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

/// A boxed future that borrows a transaction.
pub type TxFuture<'c, T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send + 'c>>;

/// Runs `work` in a transaction: committed when it answers `Ok`, rolled back otherwise, begun again when it lost
/// against another. `work` may therefore run several times and must keep no effects of its own.
pub async fn transaction<T, F>(db: &DatabaseConnection, work: F) -> Result<T, Error>
where
    F: for<'c> Fn(&'c DatabaseTransaction) -> TxFuture<'c, T> + Send + Sync,
    T: Send,
{
    let mut attempt = 1;
    loop {
        match in_time(db, once(db, &work)).await {
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

/// SQLite has no network, and its own limits.
async fn in_time<T>(db: &DatabaseConnection, work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    if db.get_database_backend() == DbBackend::Sqlite {
        return work.await;
    }
    let late = |_| Error::Db(DbErr::Custom(format!("no end of a transaction within {PATIENCE:?}")));
    tokio::time::timeout(PATIENCE, work).await.map_err(late)?
}

async fn once<T, F>(db: &DatabaseConnection, work: &F) -> Result<T, Error>
where
    F: for<'c> Fn(&'c DatabaseTransaction) -> TxFuture<'c, T>,
{
    let options = match db.get_database_backend() {
        DbBackend::Sqlite => {
            TransactionOptions { sqlite_transaction_mode: Some(SqliteTransactionMode::Immediate), ..Default::default() }
        }
        _ => TransactionOptions { isolation_level: Some(IsolationLevel::ReadCommitted), ..Default::default() },
    };
    let tx = db.begin_with_options(options).await?;
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

/// Cuts rows into the pieces that one INSERT takes each. Their sizes are powers of two, so that a handful of texts serves
/// batches of every size: each text is parsed once a connection and kept. A text for every size would be parsed nearly
/// every time, and the kept ones take a megabyte each.
pub fn chunks<T>(mut rows: &[T]) -> impl Iterator<Item = &[T]> {
    std::iter::from_fn(move || {
        let size = 1 << rows.len().min(MOST_ROWS).checked_ilog2()?;
        let (chunk, rest) = rows.split_at(size);
        rows = rest;
        Some(chunk)
    })
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
    use super::*;

    #[test]
    fn rows_are_cut_into_powers_of_two_and_none_is_lost() {
        for len in [0, 1, 2, 3, 100, 255, 256, 257, 1000] {
            let rows: Vec<usize> = (0..len).collect();
            let cut: Vec<&[usize]> = chunks(&rows).collect();
            assert_eq!(cut.concat(), rows);
            assert!(cut.iter().all(|chunk| chunk.len().is_power_of_two() && chunk.len() <= MOST_ROWS), "{len}");
        }
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

    /// E21, on SQLite: what it does by itself when the disk is full must not cost what is committed later.
    #[tokio::test]
    async fn what_is_committed_after_sqlite_has_rolled_back_by_itself_is_on_disk() {
        use sea_orm::{ConnectionTrait, Statement};
        let database = crate::testing::sqlite().await;
        let run = async |sql: &'static str, fails: bool| {
            transaction(&database.connection, move |tx| {
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
