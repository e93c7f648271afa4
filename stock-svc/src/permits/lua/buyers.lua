-- Everybody who holds or owns something.
return redis.call('HKEYS', BUYERS)
