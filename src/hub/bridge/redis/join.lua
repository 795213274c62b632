-- Tells a hub where the stream is, and in which life of Redis; founds one where there is none, or where it lost what the
-- hub knows.
-- KEYS 1 meta, 2 stream, 3 sizes
-- ARGV 1 known epoch, 2 known head, 3 life in which the hub joined before, 4 who leads now (Redis's run id), 5 fresh epoch
local meta = redis.call('HMGET', KEYS[1], 'epoch', 'head', 'run', 'lives')
local epoch, head, lives = meta[1], meta[2] or '0', meta[4] or ''

-- At the beginning of each life a copy may have taken over that lacks what came last. So it is noted where the stream
-- stood then, for the last lives: '<run id>/<number>:<head> …'. They are numbered, because a server that led before may
-- lead again, after others.
if epoch and meta[3] ~= ARGV[4] then
  local last = tonumber(lives:match('/(%d+):%d+$') or '0')
  lives = lives .. ' ' .. ARGV[4] .. '/' .. string.format('%.0f', last + 1) .. ':' .. head
  while #lives > 2048 do lives = lives:gsub('^%s*%S+', '', 1) end
  redis.call('HSET', KEYS[1], 'run', ARGV[4], 'lives', lives)
end

-- How far the hub and this stream have the same: to the lowest head at which a life began since the hub's. Of a life that
-- this stream does not know nothing can be said.
local function shared()
  local lowest, known = tonumber(head), false
  for life, began in lives:gmatch('(%S+):(%d+)') do
    if known then lowest = math.min(lowest, tonumber(began)) end
    known = known or life == ARGV[3]
  end
  return known and lowest or 0
end

if not epoch or (epoch == ARGV[1] and shared() < tonumber(ARGV[2])) then
  epoch, head, lives = ARGV[5], '0', ARGV[4] .. '/1:0'
  redis.call('DEL', KEYS[2], KEYS[3])
  redis.call('HSET', KEYS[1], 'epoch', epoch, 'head', '0', 'run', ARGV[4], 'lives', lives, 'bytes', '0')
end
return epoch .. ' ' .. head .. ' ' .. lives:match('(%S+):%d+$')
